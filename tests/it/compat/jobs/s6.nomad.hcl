# An image whose entry point must be process 1.
job "compat-s6" {
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

    task "s6" {
      driver = "docker"
      config {
        image = "polydev-first:1"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
