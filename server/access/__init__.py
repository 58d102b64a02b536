"""Who may do what: users, API tokens, roles, ACL paths, passwords and tickets."""
