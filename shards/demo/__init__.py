"""Generated data sets: videos of moving shapes with captions that are true of them.

shapes      short ones, in pairs that differ only in order or direction; narrated: long ones that somebody speaks about
scenes      what is to be seen in them, and the pictures
"""
