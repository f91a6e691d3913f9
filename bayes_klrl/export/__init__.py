"""Results for other tools and for people: ArviZ and netCDF, pictures, folders of output.

Read `datatree` first (draws as labelled arrays for ArviZ, and as netCDF files), then `pictures` with `plot_style` (the look
that all pictures share, and `drawing`, from which a new one starts) and `output_folder` (which folders we may write into).
"""
