# An OpenTelemetry Collector on each node, with the configuration of ops/collector.yaml. Run it from
# the top folder: nomad job run ops/nomad/collector.nomad.hcl

variable "image" {
  type        = string
  default     = "otel/opentelemetry-collector-contrib:0.145.0"
  description = "Image of the collector, with its program as entry point."
}

variable "config" {
  type        = string
  default     = "ops/collector.yaml"
  description = "The collector's configuration: a file beside the job, from the folder where it is submitted."
}

variable "datacenters" {
  type        = list(string)
  default     = ["*"]
  description = "Where the collectors are."
}

job "polydev-collector" {
  type        = "system"
  priority    = 60
  datacenters = var.datacenters

  group "collector" {
    network {
      # The addresses are those of the configuration: drivers and shims of the node use loopback.
      mode = "host"
    }

    restart {
      attempts = 10
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    task "collector" {
      driver = "docker"

      config {
        image        = var.image
        args         = ["--config=/local/collector.yaml"]
        network_mode = "host"

        # Traces and log lines, until the configuration sends them elsewhere.
        mount {
          type   = "tmpfs"
          target = "/var/lib/otelcol"
          tmpfs_options {
            mode = 1023 # 1777 in octal: the image's user is not root.
            size = 536870912
          }
        }
      }

      template {
        data        = file(var.config)
        destination = "local/collector.yaml"
        # The configuration's own braces are not Nomad's.
        left_delimiter  = "[["
        right_delimiter = "]]"
      }

      resources {
        cpu    = 200
        memory = 768
      }
    }
  }
}
