# A task on each node.
job "compat-system" {
  type = "system"

  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }

    task "agent" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo on each node; exec sleep 600
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
