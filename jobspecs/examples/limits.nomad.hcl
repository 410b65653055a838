# Hard limits: a CPU quota, memory without swap, the number of processes, and bandwidth in
# each direction. The container also has a folder of the allocation and a device of the host.
job "example-limits" {
  group "group" {
    task "task" {
      driver = "polydev"

      config {
        image          = "polydev-busybox:1"
        command        = "sleep"
        args           = ["1000000"]
        cpu_hard_limit = true
        pids_limit     = 32

        bandwidth {
          egress_mbits  = 10
          ingress_mbits = 10
        }

        volumes = ["local/data:/data"]

        devices {
          host_path          = "/dev/null"
          container_path     = "/dev/hole"
          cgroup_permissions = "rw"
        }

        ulimit {
          nofile = "1024:2048"
        }
      }

      kill_signal  = "SIGKILL"
      kill_timeout = "2s"

      resources {
        cpu    = 500
        memory = 64
      }
    }
  }
}
