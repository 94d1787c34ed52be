"""What every room uses: errors, progress bars, several processes, names of other tools."""
