"""The methods, by the names that `--method` takes."""

import autoencoder
import cae
import cmae
import cmae_loc
import conmim
import dvae
import lcmae
import mae

METHODS = {
    "mae": mae.MAE,
    "cmae": cmae.CMAE,
    "cmae_loc": cmae_loc.CMAELoc,
    "cae": cae.CAE,
    "conmim": conmim.ConMIM,
    "lcmae": lcmae.LCMAE,
    "autoencoder": autoencoder.Autoencoder,
    "dvae": dvae.DVAE,
}
