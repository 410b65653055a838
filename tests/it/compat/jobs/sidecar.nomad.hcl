# A task in the network of another one, as behind a VPN.
job "compat-sidecar" {
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

    task "front" {
      driver = "docker"
      lifecycle {
        hook    = "prestart"
        sidecar = true
      }
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          ip -o -4 addr show eth0 | awk '{ print $4 }' >/alloc/data/address; exec sleep 600
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }

    task "back" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          until [ -s /alloc/data/address ]; do sleep 0.1; done
          [ "$(ip -o -4 addr show eth0 | awk '{ print $4 }')" = "$(cat /alloc/data/address)" ] && echo the same network
          sleep 1
          EOT
        ]
        network_mode = "container:front-${NOMAD_ALLOC_ID}"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
