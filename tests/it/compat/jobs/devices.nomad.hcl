# A device of the host.
job "compat-devices" {
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

    task "devices" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          ls -l /dev/nothing | awk '{ print $1, $5, $6 }'
          echo x >/dev/nothing && echo written
          ls /dev | sort | grep -v -e '^core$' | tr '\n' ' '
          echo; sleep 1
          EOT
        ]
        devices = [
          {
            host_path      = "/dev/null"
            container_path = "/dev/nothing"
          }
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
