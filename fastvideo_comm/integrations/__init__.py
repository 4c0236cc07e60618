"""Makes other packages use this library: a module for each has `install()` and `uninstall()`.

Nothing is imported or replaced before `install` is called. Each module names the versions of its
package that it was tested with, and refuses others unless told not to.
"""
