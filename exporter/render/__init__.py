"""A report as text: for a pull request (markdown), for the terminal."""
