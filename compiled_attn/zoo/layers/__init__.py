"""Parts that several papers cite, one idea a file; what a paper names itself stays in its own file."""
