"""The only modules that touch private names of other libraries: one file a library."""
