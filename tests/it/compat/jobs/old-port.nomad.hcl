# A port in the form that jobs had before Nomad 1.0, with its bookkeeping of Mbit/s.
job "compat-old-port" {
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

    task "old" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo inside $NOMAD_PORT_http; ip -o -4 addr show eth0 | wc -l; sleep 1
          EOT
        ]
        port_map {
          http = 80
        }
      }

      resources {
        cpu    = 20
        memory = 32
        network {
          mbits = 10
          port "http" {}
        }
      }
    }
  }
}
