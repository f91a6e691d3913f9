"""Results for other tools and for people: ArviZ and netCDF, pictures, folders of output.

Read `datatree` first (draws as labelled arrays for ArviZ, and as netCDF files; `installed_arviz` imports ArviZ), then
`sealed_files` (netCDF files that end with a checksum), `pictures` with `plot_style` (the look that all pictures share, and
`drawing`, from which a new one starts) and `output_folder` (which folders we may write into). `html` has the tables of
notebooks, of which `notebook` makes those of posteriors and draws; `printed` has tables as plain text. `model_card` writes the
README.md of a saved guide, and `hub` uploads its folder.
"""
