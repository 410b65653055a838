# Two tasks in a network of their group.
job "compat-bridge" {
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

    network {
      mode = "bridge"
      port "http" {
        to = 8080
      }
    }
    task "server" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo hello >/local/index.html; httpd -p 8080 -h /local; until [ -e /alloc/data/done ]; do sleep 0.1; done
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }

    task "client" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          until wget -q -O - 2>/dev/null http://127.0.0.1:8080/index.html; do sleep 0.1; done
          touch /alloc/data/done; sleep 1
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
