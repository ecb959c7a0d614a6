"""The programs behind the modes of main.py, one file each."""
