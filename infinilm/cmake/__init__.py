"""Where the CMake package of the backend ABI is installed; CMake looks here for `find_package(infinilm CONFIG)`."""
