"""Programs for whoever installs the library: the doctor and the small benchmark."""
