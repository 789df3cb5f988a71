"""Which way each layer's norm and clipped sum are computed, by the rates of this device."""
