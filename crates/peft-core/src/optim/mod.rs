//! From a summed gradient to the next parameters.
