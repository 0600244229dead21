"""Pipeline parallelism: schedules as data, one simulator, one runtime that executes the same schedules."""
