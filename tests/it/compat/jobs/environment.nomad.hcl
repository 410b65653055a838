# Variables and Nomad's folders.
job "compat-environment" {
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

    task "env" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          env | grep -v -e ^HOSTNAME= -e ^SHLVL= -e ^_= -e NOMAD_ALLOC_INDEX | sort
          cat /proc/self/mountinfo | awk '{ print $5, $6 }' | grep -e '^/alloc ' -e ^/local -e ^/secrets | sed 's/,relatime//' | sort
          sleep 1
          EOT
        ]
      }

      env {
        EMPTY    = ""
        SENTENCE = "two words"
        NODE     = "${node.class}"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
