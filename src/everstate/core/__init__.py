"""What everything stands on: ops, states, packing, configuration, precision, errors."""
