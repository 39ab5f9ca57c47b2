"""`surgeon::routed_ffn_int8` as an operator of OpenVINO, in a library that OpenVINO loads as an extension.

The library is built on this machine, for the version of OpenVINO that is installed: `build.library()`. A model with the
operator runs wherever that version of OpenVINO and the library are; it needs neither torch nor this package.
"""
