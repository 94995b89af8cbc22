"""What is written and read back: the folder of a compiled model, complete or not there at all, and models loaded
from it. Everything that stands in such a folder has its one definition here."""
