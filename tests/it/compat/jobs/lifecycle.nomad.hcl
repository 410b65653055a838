# Tasks before, after and at the end of another one.
job "compat-lifecycle" {
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

    task "prestart" {
      driver = "docker"
      lifecycle {
        hook = "prestart"
      }
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo prestart >>/alloc/data/order
          true
          cat /alloc/data/order; sleep 1
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }

    task "main" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo main >>/alloc/data/order
          sleep 1
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }

    task "poststart" {
      driver = "docker"
      lifecycle {
        hook = "poststart"
      }
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo poststart >>/alloc/data/order
          sleep 1
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }

    task "poststop" {
      driver = "docker"
      lifecycle {
        hook = "poststop"
      }
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo poststop >>/alloc/data/order
          true
          cat /alloc/data/order; sleep 1
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
