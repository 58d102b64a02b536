"""Room hypervisor."""
