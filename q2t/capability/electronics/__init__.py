"""Electronic circuits: values, real parts, and problems about them."""
