"""What the tests share: real classes at tiny sizes, never stand-ins."""
