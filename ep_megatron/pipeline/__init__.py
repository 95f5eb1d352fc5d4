"""Pipeline schedules as data, their simulation and pictures, and the runtime that executes them."""
