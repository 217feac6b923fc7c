"""Do the same random host operations look the same natively and through the mount?"""
