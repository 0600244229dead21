"""Pipeline parallelism: schedules as data, one simulator, and one runtime that executes the same schedules."""
