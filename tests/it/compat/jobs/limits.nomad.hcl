# Limits of all kinds.
job "compat-limits" {
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

    task "limits" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          ulimit -n; ulimit -c
          cat /proc/sys/net/core/somaxconn
          cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max
          cat /sys/fs/cgroup/pids/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids.max
          cat /proc/self/oom_score_adj
          sleep 1
          EOT
        ]
        pids_limit        = 50
        memory_hard_limit = 64
        oom_score_adj     = 100
        sysctl = {
          "net.core.somaxconn" = "1234"
        }
        ulimit {
          nofile = "1000"
          core   = "0"
        }
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
