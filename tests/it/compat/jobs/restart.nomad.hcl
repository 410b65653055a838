# A task that fails and is started again.
job "compat-restart" {
  type = "batch"
  group "g" {
    restart {
      attempts = 1
      delay    = "0s"
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
    task "again" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo try >>/alloc/data/tries; wc -l </alloc/data/tries; sleep 1; exit 3
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
