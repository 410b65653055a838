# A task that is entered and signalled.
job "compat-exec" {
  type = "service"

  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }

    task "open" {
      driver = "docker"
      user = "user"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          trap 'echo usr1' USR1
          echo ready
          while :; do sleep 0.1; done
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
