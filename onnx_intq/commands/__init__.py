"""The commands of the command line, a file each; heavy libraries are imported as they run."""
