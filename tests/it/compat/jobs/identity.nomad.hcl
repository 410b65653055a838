# The identity of a workload, as a file and a variable.
job "compat-identity" {
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

    task "identity" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          [ "$NOMAD_TOKEN" = "$(cat /secrets/nomad_token)" ] && echo the same token
          cut -d. -f1 /secrets/nomad_token | wc -c | awk '{ print ($1 > 10) ? "a header" : "none" }'
          sleep 1
          EOT
        ]
      }

      identity {
        env  = true
        file = true
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
