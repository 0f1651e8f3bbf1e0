"""`trfpp study`: what a domain patch does, measured with the commands that everybody has."""
