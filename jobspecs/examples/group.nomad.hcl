# Two tasks that share one network namespace. The node needs the CNI plugins. The tasks reach
# each other on loopback. Others reach the first task through a port of the host.
job "example-group" {
  group "group" {
    network {
      mode = "bridge"

      port "http" {
        to = 8080
      }
    }

    task "task" {
      driver = "polydev"

      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", "echo hello >/local/index.html; exec httpd -f -p 8080 -h /local"]
      }

      resources {
        cpu    = 100
        memory = 32
      }
    }

    task "neighbour" {
      driver = "polydev"

      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", "until wget -q -O - http://127.0.0.1:8080; do sleep 1; done; sleep 1000000"]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
