"""How several losses become one."""
