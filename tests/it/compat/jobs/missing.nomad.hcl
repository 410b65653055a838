# A program that is not in the image.
job "compat-missing" {
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

    task "missing" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "no-such-program"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
