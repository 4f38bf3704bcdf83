"""The command line: parsing, composition and printing only. Importing it imports no torch."""
