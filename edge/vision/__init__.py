"""What is seen in a picture: pure functions on frames and small objects that remember. Only the camera driver's process
comes here; it is the one part of the edge that needs numpy and OpenCV.
"""
