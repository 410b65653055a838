# A database with a folder of its own, more shared memory, and a signal that ends it well.
job "compat-database" {
  type = "service"

  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }

    task "db" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          trap 'echo closing; exit 0' INT
          echo row >>/var/lib/db/table
          df /dev/shm | awk 'NR==2 { print "shm", $2 }'
          ulimit -n
          echo ready
          while :; do sleep 0.1; done
          EOT
        ]
        volumes  = ["local/db:/var/lib/db"]
        shm_size = 33554432
        ulimit {
          nofile = "2048:4096"
        }
      }

      kill_signal  = "SIGINT"
      kill_timeout = "10s"

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
