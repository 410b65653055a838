# A task that ships another one's log files.
job "compat-shipper" {
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

    task "app" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          mkdir -p $NOMAD_ALLOC_DIR/logs/app
          echo a line of its own >$NOMAD_ALLOC_DIR/logs/app/a.log
          echo a line for Nomad
          until [ -e /alloc/data/read ]; do sleep 0.1; done
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }

    task "shipper" {
      driver = "docker"
      lifecycle {
        hook = "poststart"
      }
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          until grep -q own /alloc/logs/app/a.log 2>/dev/null && grep -q Nomad /alloc/logs/app.stdout.0; do sleep 0.1; done
          cat /alloc/logs/app/a.log /alloc/logs/app.stdout.0
          touch /alloc/data/read; sleep 1
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
