"""When a small kernel is worth a parallel launch."""

# A launch costs 2–3 µs with spinning workers, a row of a norm or a rotation less than 1 µs.
SERIAL_ROWS = 4
