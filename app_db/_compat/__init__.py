"""The only modules that use private names of other libraries: one file for each library."""
