"""Exports: the forms in which other tools load a model, one file per form.

A file here holds a function of the file's name and its description, `EXPORT`; the command line finds both by
themselves. Since it reads every file for its help, these import torch and what needs it inside their functions.
"""
