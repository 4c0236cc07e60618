"""Programs for everybody who installs the library: the doctor and the small benchmark."""
