"""Room pxar."""
