# Runs once. `nomad alloc logs` shows every line, and `nomad alloc status` shows the exit code.
job "example-batch" {
  type = "batch"

  group "group" {
    task "task" {
      driver = "polydev"

      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", "echo running as $(id -un) in ${NOMAD_DC}; echo a warning >&2"]
      }

      user = "user"

      resources {
        cpu    = 100
        memory = 32
      }
    }
  }
}
