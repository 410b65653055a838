# A task with a terminal.
job "compat-terminal" {
  type = "batch"

  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "terminal" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          test -t 1 && echo a terminal; stty size >/dev/null 2>&1 && echo with a size; sleep 1
          EOT
        ]
        tty         = true
        interactive = true
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
