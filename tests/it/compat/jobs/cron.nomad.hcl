# Jobs of cron, and log files, that write to the streams of process 1.
job "compat-cron" {
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

    task "cron" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          ln -s /proc/1/fd/1 /tmp/app.log
          echo started; sleep 0.5
          (echo from a job >/proc/1/fd/1)
          echo from a log file >>/tmp/app.log
          echo an error >/proc/1/fd/2
          sleep 1
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
